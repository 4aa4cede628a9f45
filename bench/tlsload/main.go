// A load generator for a Unix socket, and for TLS 1.3 with a client certificate, which h2load can't show. Each connection
// sends the same request again and again, and reads each answer before the next one. It prints the requests per second.
//
// tlsload HOST:PORT SERVER-NAME CA CERT KEY CONNECTIONS REQUESTS FILE   (FILE holds the bytes of the request)
// tlsload unix:PATH CONNECTIONS REQUESTS FILE
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	fail(err)
	return value
}

// dialer gives connections to the service that the arguments name, and the arguments that are left.
func dialer(arguments []string) (func() (net.Conn, error), []string) {
	if path, found := strings.CutPrefix(arguments[0], "unix:"); found {
		return func() (net.Conn, error) { return net.Dial("unix", path) }, arguments[1:]
	}
	pem, err := os.ReadFile(arguments[2])
	fail(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	own, err := tls.LoadX509KeyPair(arguments[3], arguments[4])
	fail(err)
	config := &tls.Config{RootCAs: roots, ServerName: arguments[1], Certificates: []tls.Certificate{own}}
	return func() (net.Conn, error) { return tls.Dial("tcp", arguments[0], config) }, arguments[5:]
}

func run(dial func() (net.Conn, error), request []byte, count int, ready *sync.WaitGroup, start chan struct{}) {
	connection, err := dial()
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
	dial, arguments := dialer(os.Args[1:])
	connections := number(arguments[0])
	each := number(arguments[1]) / connections
	request, err := os.ReadFile(arguments[2])
	fail(err)
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	for i := 0; i < connections; i++ {
		ready.Add(1)
		done.Add(1)
		go func() {
			run(dial, request, each, &ready, start)
			done.Done()
		}()
	}
	ready.Wait()
	begun := time.Now()
	close(start)
	done.Wait()
	fmt.Printf("%.1f\n", float64(each*connections)/time.Since(begun).Seconds())
}
