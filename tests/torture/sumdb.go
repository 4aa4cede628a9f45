// Verifies a tree of minikms-auditor with Go's checksum-database packages (golang.org/x/mod/sumdb), which the auditor's
// authors did not write. Standard input: the JSON of `question`. Exit status 1, with a sentence, if anything is wrong.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type question struct {
	Directory string                         // of the tree
	LogKey    string                         // its verifier key
	Exported  []struct{ Line, Proof string } // all lines of the tree, in order
	Earlier   []struct {                     // trees that it extends
		Size  int64
		Root  string
		Proof []string
	}
}

type reader struct{ directory string }

func (r reader) Height() int { return 8 }

func (r reader) SaveTiles([]tlog.Tile, [][]byte) {}

// ReadTiles takes paths as C2SP tlog-tiles has them: those of the checksum database, without the height.
func (r reader) ReadTiles(tiles []tlog.Tile) (data [][]byte, err error) {
	for _, tile := range tiles {
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		content, err := os.ReadFile(filepath.Join(r.directory, path))
		if err != nil {
			return nil, err
		}
		data = append(data, content)
	}
	return data, nil
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func hashes(texts []string) (found []tlog.Hash) {
	for _, text := range texts {
		hash, err := tlog.ParseHash(text)
		check(err)
		found = append(found, hash)
	}
	return found
}

// open verifies a tree checkpoint.
func open(content []byte, verifiers note.Verifiers) tlog.Tree {
	opened, err := note.Open(content, verifiers)
	check(err)
	lines := strings.Split(opened.Text, "\n")
	size, err := strconv.ParseInt(lines[1], 10, 64)
	check(err)
	return tlog.Tree{N: size, Hash: hashes(lines[2:3])[0]}
}

func main() {
	log.SetFlags(0)
	var asked question
	check(json.NewDecoder(os.Stdin).Decode(&asked))
	key, err := note.NewVerifier(asked.LogKey)
	check(err)
	verifiers := note.VerifierList(key)
	content, err := os.ReadFile(filepath.Join(asked.Directory, "checkpoint"))
	check(err)
	tree := open(content, verifiers)
	stored := tlog.TileHashReader(tree, reader{asked.Directory})
	if int64(len(asked.Exported)) != tree.N {
		log.Fatalf("%d lines of %d", len(asked.Exported), tree.N)
	}
	for index, each := range asked.Exported {
		head, checkpoint, _ := strings.Cut(each.Proof, "\n\n")
		if !bytes.Equal([]byte(checkpoint), content) {
			log.Fatalf("line %d is proven for another tree", index)
		}
		lines := strings.Split(head, "\n")
		if lines[1] != fmt.Sprintf("index %d", index) {
			log.Fatalf("line %d has %s", index, lines[1])
		}
		entry := sha256.Sum256([]byte(each.Line + "\n"))
		leaf := tlog.RecordHash(entry[:])
		check(tlog.CheckRecord(hashes(lines[2:]), tree.N, tree.Hash, int64(index), leaf))
		own, err := tlog.ProveRecord(tree.N, int64(index), stored) // from the tiles, which it checks against the root
		check(err)
		check(tlog.CheckRecord(own, tree.N, tree.Hash, int64(index), leaf))
	}
	for _, earlier := range asked.Earlier {
		root := hashes([]string{earlier.Root})[0]
		check(tlog.CheckTree(hashes(earlier.Proof), tree.N, tree.Hash, earlier.Size, root))
	}
	fmt.Println("verified", tree.N)
}
