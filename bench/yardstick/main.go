// Yardstick for /encrypt: what a bare Go key service over a Unix socket can do, so that our figure means the same on
// every machine. One AES-256-GCM key in memory, the same JSON and base64 as ours; no audit, no policy, no storage.
// Deliberately plain net/http: tuning it would move the yardstick.
package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
)

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "yardstick:", err)
	os.Exit(1)
}

func newAEAD() cipher.AEAD {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		fatal(err)
	}
	return aead
}

func encrypt(aead cipher.AEAD) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var request struct {
			KeyID     string `json:"key_id"`
			Plaintext []byte `json:"plaintext"` // encoding/json takes base64
		}
		if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		nonce := make([]byte, aead.NonceSize())
		if _, err := rand.Read(nonce); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		answer := struct {
			Ciphertext []byte `json:"ciphertext"`
		}{aead.Seal(nonce, nonce, request.Plaintext, nil)} // nonce | ciphertext | tag
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(answer)
	}
}

func main() {
	if len(os.Args) != 2 {
		fatal(fmt.Errorf("usage: yardstick SOCKET"))
	}
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		fatal(err)
	}
	http.HandleFunc("POST /encrypt", encrypt(newAEAD()))
	fatal(http.Serve(listener, nil))
}
