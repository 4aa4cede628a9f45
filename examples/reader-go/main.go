// Reads what miniKMS has written, from docs/spec/ alone: records, streams, backup archives, audit logs, receipts.
//
// It shares no code with the project and uses the standard library alone. It checks the pages, and is not for production,
// because Go does not let it erase keys. Not here: tombstones of an archive; compressed segments (unpack them: `zstd -d`);
// rule 5 of a log, which needs the audit key; of a tree, tiles, ECDSA signatures and the age of its checkpoint.
package main

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"strconv"
)

const usage = `usage:
  reader archive ARCHIVE SHARES                  check a backup archive, and list its keys
  reader record ARCHIVE SHARES KEY_ID AAD        open the record at standard input; AAD in base64
  reader stream ARCHIVE SHARES                   open the stream at standard input
  reader audit DIR PUBLIC_KEY [NOTE NOTE_KEYS]   verify an audit log, and that a tree checkpoint has its lines
  reader receipt FILE PUBLIC_KEY [NOTE_KEYS]     verify the receipt of a destroyed key, and that the tree has its line
SHARES: a file with shares of the root key, a line each. PUBLIC_KEY: of the audit log, base64.
NOTE_KEYS: LOG_VKEY QUORUM [WITNESS_VKEY...]`

// refusal is the panic of `check`: what was read is not what it should be.
type refusal string

func check(ok bool, format string, values ...any) {
	if !ok {
		panic(refusal(fmt.Sprintf(format, values...)))
	}
}

func must[T any](value T, err error) T {
	check(err == nil, "%v", err)
	return value
}

func decode64(text string) []byte { return must(base64.StdEncoding.Strict().DecodeString(text)) }

func main() {
	out := bufio.NewWriter(os.Stdout)
	defer func() {
		failure := recover() // of `check`, or of Go itself
		if err := out.Flush(); failure == nil && err != nil {
			failure = err
		}
		if failure != nil {
			fmt.Fprintln(os.Stderr, failure)
			os.Exit(1)
		}
	}()
	args := os.Args[1:]
	check(len(args) >= 3, usage)
	path, second, rest := args[1], args[2], args[3:]
	switch {
	case args[0] == "archive" && len(rest) == 0:
		opened := openArchive(path, second)
		for _, id := range opened.ids {
			file := opened.keys[id].file
			fmt.Fprintln(out, id, file.Thread_id, file.Purpose, file.State)
		}
	case args[0] == "record" && len(rest) == 2:
		out.Write(openArchive(path, second).openRecord(rest[0], must(io.ReadAll(os.Stdin)), decode64(rest[1])))
	case args[0] == "stream" && len(rest) == 0:
		openArchive(path, second).openStream(bufio.NewReader(os.Stdin), out)
	case args[0] == "audit" && len(rest) != 1 && len(rest) != 2:
		verifyLog(path, second, rest, out)
	case args[0] == "receipt" && len(rest) != 1:
		verifyReceipt(path, second, rest, out)
	default:
		check(false, usage)
	}
}

func parseNoteKeys(args []string) (keys noteKeys) {
	keys.quorum = must(strconv.Atoi(args[1]))
	seen := map[string]bool{}
	for i, text := range append(args[:1:1], args[2:]...) {
		key := parseVkey(text)
		check((key.kind == typeCosignature) == (i > 0) && !seen[string(key.public)], "%s has a wrong type, or is given twice", text)
		seen[string(key.public)] = true
		keys.all = append(keys.all, key)
	}
	check(keys.quorum >= 0 && keys.quorum < len(keys.all), "a quorum of %s needs as many witnesses", args[1])
	return keys
}
