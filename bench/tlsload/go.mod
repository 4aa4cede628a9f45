module tlsload

go 1.19
