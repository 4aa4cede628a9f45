module tlsload

go 1.22
