// A load generator over TLS 1.3 with a client certificate, which h2load can't present. Each connection sends the same
// request again and again, and reads each answer before the next one. It prints the requests per second.
//
// tlsload HOST:PORT SERVER-NAME CA CERT KEY CONNECTIONS REQUESTS FILE   (FILE holds the bytes of the request)
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(address string, config *tls.Config, request []byte, count int, ready *sync.WaitGroup, start chan struct{}) {
	connection, err := tls.Dial("tcp", address, config)
	fail(err)
	defer connection.Close()
	reader := bufio.NewReaderSize(connection, 64*1024)
	ready.Done()
	<-start
	for i := 0; i < count; i++ {
		_, err = connection.Write(request)
		fail(err)
		answer, err := http.ReadResponse(reader, nil)
		fail(err)
		_, err = io.Copy(io.Discard, answer.Body)
		fail(err)
		if answer.StatusCode != 200 {
			fail(fmt.Errorf("answered %d", answer.StatusCode))
		}
	}
}

func main() {
	arguments := os.Args[1:]
	pem, err := os.ReadFile(arguments[2])
	fail(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	own, err := tls.LoadX509KeyPair(arguments[3], arguments[4])
	fail(err)
	connections, err := strconv.Atoi(arguments[5])
	fail(err)
	requests, err := strconv.Atoi(arguments[6])
	fail(err)
	request, err := os.ReadFile(arguments[7])
	fail(err)
	config := &tls.Config{RootCAs: roots, ServerName: arguments[1], Certificates: []tls.Certificate{own}}
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	for i := 0; i < connections; i++ {
		ready.Add(1)
		done.Add(1)
		go func() {
			run(arguments[0], config, request, requests/connections, &ready, start)
			done.Done()
		}()
	}
	ready.Wait()
	begun := time.Now()
	close(start)
	done.Wait()
	fmt.Printf("%.1f\n", float64(requests/connections*connections)/time.Since(begun).Seconds())
}
