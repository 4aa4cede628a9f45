package main

// Audit logs, trees and receipts: audit.md, tree.md, tombstones.md.

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const typeCosignature, signedFacts = 4, "epoch key lines lines_sha256 log_id previous_sig signature tombstones"

// event: the members of a line that are looked at. raw: all of it, canonical.
type event struct {
	raw, kind, keyID, outcome string
	seq                       uint64
	facts                     map[string]string // a text with its quotation marks
}

var (
	// The canonical form has one order, and leaves out what is empty.
	eventForm = regexp.MustCompile(strings.NewReplacer("N", `(?:0|[1-9][0-9]{0,18})`, "P", `[1-9][0-9]{0,18}`, "S", `[^"]*`,
		"T", `[^"]+`).Replace(`^\{"seq":(P),"ts":P,"type":"(S)","actor":"S"(?:,"pid":P)?(?:,"key_id":"(T)")?` +
		`(?:,"key_ids":\["S"(?:,"S")*\])?(?:,"thread_id":"T")?(?:,"count":P)?,"outcome":"(S)"(?:,"request_id":"T")?` +
		`(?:,"request_ids":\["S"(?:,"S")*\])?(?:,"detail":"T")?(?:,"facts":\{("T":(?:"S"|N)(?:,"T":(?:"S"|N))*)\})?\}$`))
	sizeForm = regexp.MustCompile(`^(0|[1-9][0-9]*)$`)
	factForm = regexp.MustCompile(`"([^"]+)":("[^"]*"|[0-9]+)`)
	framed   = regexp.MustCompile(`^\{"event":([\x20-\x5b\x5d-\x7e]*),"sig":"([A-Za-z0-9+/]{43}=)"\}$`)
	closed   = regexp.MustCompile(`^minikms-audit\.log\.([1-9][0-9]*)(\.zst)?$`)
	// Types that have these facts and no others.
	factsOf = map[string]string{"checkpoint": signedFacts, "segment_close": signedFacts + " next_segment",
		"audit_key":    signedFacts + " next_key next_public_key",
		"segment_open": "epoch format key log_id previous_seq previous_sha256 previous_sig public_key segment tombstones"}
)

func (e *event) text(name string) string { return strings.Trim(e.facts[name], `"`) }

// integer gives 0 for a text and for no fact, which is none of the values that are compared.
func (e *event) integer(name string) uint64 {
	value, _ := strconv.ParseUint(e.facts[name], 10, 63)
	return value
}

// parseLine gives the event of a line without its newline, and SIG. It refuses every form but the canonical one.
func parseLine(line []byte) (*event, string) {
	parts := framed.FindSubmatch(line)
	check(parts != nil && len(line) < 1<<20, "a line is not framed as one")
	form := eventForm.FindSubmatch(parts[1])
	check(form != nil, "a line is not canonical")
	e := &event{string(form[0]), string(form[2]), string(form[3]), string(form[4]), 0, map[string]string{}}
	e.seq = must(strconv.ParseUint(string(form[1]), 10, 63))
	last := ""
	for _, fact := range factForm.FindAllSubmatch(form[5], -1) {
		name := string(fact[1])
		check(name > last, "the facts of line %d have another order", e.seq)
		e.facts[name], last = string(fact[2]), name
	}
	decode64(string(parts[2]))
	return e, string(parts[2])
}

func (e *event) checkFacts(names string) {
	for name := range e.facts {
		check(slices.Contains(strings.Fields(names), name), "line %d has the fact %s", e.seq, name)
	}
}

func (e *event) isSignedBy(public []byte, label string) bool {
	unsigned := strings.Replace(e.raw, `,"signature":`+e.facts["signature"], "", 1)
	return len(public) == 32 && ed25519.Verify(public, []byte(label+"\x00"+unsigned), decode64(e.text("signature")))
}

func hexSum(content []byte) string { sum := sha256.Sum256(content); return hex.EncodeToString(sum[:]) }

// leafOf gives the leaf of a line with its newline.
func leafOf(line []byte) [32]byte {
	entry := sha256.Sum256(line)
	return sha256.Sum256(append([]byte{0}, entry[:]...))
}

// readSegments gives the content of each segment, in order, and its number; 0 for the one that is being written.
func readSegments(directory string) (numbers []uint64, contents map[uint64][]byte) {
	contents = map[uint64][]byte{0: must(os.ReadFile(filepath.Join(directory, "minikms-audit.log")))}
	for _, file := range must(os.ReadDir(directory)) {
		if parts := closed.FindStringSubmatch(file.Name()); parts != nil {
			n, path := must(strconv.ParseUint(parts[1], 10, 63)), filepath.Join(directory, "minikms-audit.log."+parts[1])
			content, err := os.ReadFile(path)
			check(err == nil, "unpack %s first: zstd -d", file.Name())
			contents[n] = content
		}
	}
	numbers = slices.Sorted(maps.Keys(contents))
	return append(numbers[1:], 0), contents
}

// verifyLog applies the rules of audit.md for a verifier that has the public key alone.
func verifyLog(directory, publicKey string, rest []string, out io.Writer) {
	public := decode64(publicKey)
	numbers, contents := readSegments(directory)
	var begin, before, signed *event
	var sig, logID string
	var keyVersion, segment, retained uint64
	var previous []byte
	var leaves [][32]byte
	for _, n := range numbers {
		content := contents[n]
		check(len(content) > 0 && content[len(content)-1] == '\n', "a file ends within a line")
		digest, lines := sha256.New(), uint64(0)
		for at, line := range bytes.SplitAfter(content[:len(content)-1], []byte("\n")) {
			line = append(bytes.TrimSuffix(line, []byte("\n")), '\n')
			e, lineSig := parseLine(line[:len(line)-1])
			opens := e.kind == "genesis" || e.kind == "segment_open"
			if begin == nil {
				begin, segment, keyVersion, logID = e, e.integer("segment"), e.integer("key"), e.text("log_id")
				check(opens && keyVersion > 0 && segment > 0 && (segment == 1) == (e.kind == "genesis") &&
					(e.kind == "segment_open" || e.seq == 1), "the log has another first line")
				sig = e.text("previous_sig")
			} else {
				follows := e.seq == before.seq+1 && e.kind != "genesis"
				check(follows && (e.kind == "segment_open") == (before.kind == "segment_close"), "line %d does not follow", e.seq)
			}
			check(opens == (at == 0), "line %d is at the wrong place of its file", e.seq)
			if names, ok := factsOf[e.kind]; ok {
				e.checkFacts(names)
			}
			if opens {
				check(e.integer("format") == 1 && e.integer("segment") == segment && (n == 0 || n == segment) &&
					e.text("log_id") == logID && e.integer("key") == keyVersion &&
					bytes.Equal(decode64(e.text("public_key")), public), "line %d opens another log or segment", e.seq)
				check(e == begin || e.text("previous_sig") == sig && e.integer("previous_seq") == before.seq &&
					e.text("previous_sha256") == hexSum(previous), "line %d names another line before it", e.seq)
			}
			if e.kind == "checkpoint" || e.kind == "segment_close" || e.kind == "audit_key" {
				check(e.text("log_id") == logID && e.integer("key") == keyVersion && e.text("previous_sig") == sig &&
					e.integer("lines") == lines && e.text("lines_sha256") == hex.EncodeToString(digest.Sum(nil)) &&
					e.isSignedBy(public, "minikms/audit/signed-line/v1"), "line %d signs something else", e.seq)
				digest, lines, signed = sha256.New(), 0, e
				if e.kind == "segment_close" {
					segment++
					check(e.integer("next_segment") == segment, "line %d names another segment", e.seq)
				} else if e.kind == "audit_key" {
					check(e.integer("next_key") > keyVersion, "line %d has an older audit key", e.seq)
					keyVersion, public = e.integer("next_key"), decode64(e.text("next_public_key"))
				}
			}
			if e.kind == "retention" && e.text("last_sig") == begin.text("previous_sig") &&
				e.integer("last_seq") == begin.integer("previous_seq") {
				retained = e.seq
			}
			digest.Write(line)
			lines++
			leaves, before, previous, sig = append(leaves, leafOf(line)), e, line, lineSig
		}
		check((n == 0) != (before.kind == "segment_close"), "a file ends with the wrong line")
	}
	check(signed != nil && (begin.seq == 1 || 0 < retained && retained < signed.seq),
		"nothing signed says where the log begins")
	fmt.Fprintf(out, "lines %d to %d, signed up to %d, by %s\n", begin.seq, before.seq, signed.seq,
		base64.StdEncoding.EncodeToString(public))
	if len(rest) > 0 {
		check(begin.seq == 1, "the log is not all of its tree")
		verifyTree(rest[0], parseNoteKeys(rest[1:]), leaves, out)
	}
}

// verifyTree checks that the lines lead to the root: the log is all of its tree.
func verifyTree(file string, keys noteKeys, lines [][32]byte, out io.Writer) {
	size, root := openCheckpoint(must(os.ReadFile(file)), keys)
	check(0 < size && size <= uint64(len(lines)), "the tree has %d lines, and the log ends before", size)
	check(treeRoot(lines[:size]) == root, "the lines do not lead to the root")
	fmt.Fprintf(out, "the tree has the first %d lines\n", size)
}

func node(left, right [32]byte) [32]byte {
	return sha256.Sum256(slices.Concat([]byte{1}, left[:], right[:]))
}

func treeRoot(leaves [][32]byte) [32]byte {
	if len(leaves) == 1 {
		return leaves[0]
	}
	split := 1 << (bits.Len(uint(len(leaves)-1)) - 1)
	return node(treeRoot(leaves[:split]), treeRoot(leaves[split:]))
}

type vkey struct {
	name       string
	kind       byte
	public, id []byte
}

// all: the key of the log, then those of witnesses.
type noteKeys struct {
	all    []vkey
	quorum int
}

func parseVkey(text string) vkey {
	parts := strings.SplitN(text, "+", 3)
	check(len(parts) == 3, "%s is no verifier key", text)
	data := decode64(parts[2])
	id := sha256.Sum256(append([]byte(parts[0]+"\n"), data...))
	check(len(data) == 33 && (data[0] == 1 || data[0] == typeCosignature) && hex.EncodeToString(id[:4]) == parts[1],
		"%s is no verifier key that this program knows", text)
	return vkey{parts[0], data[0], data[1:], id[:4]}
}

func (k vkey) verifies(text string, value []byte) bool {
	if k.kind != typeCosignature {
		return ed25519.Verify(k.public, []byte(text), value)
	}
	if len(value) != 72 {
		return false
	}
	message := fmt.Sprintf("cosignature/v1\ntime %d\n%s", binary.BigEndian.Uint64(value), text)
	return ed25519.Verify(k.public, []byte(message), value[8:])
}

// openCheckpoint gives size and root of a tree checkpoint that the log has signed and a quorum has cosigned.
func openCheckpoint(note []byte, keys noteKeys) (uint64, [32]byte) {
	at := bytes.LastIndex(note, []byte("\n\n"))
	check(at > 0 && len(note) <= 128<<10 && note[len(note)-1] == '\n', "this is no signed note")
	text, byKey := string(note[:at+1]), map[string][]byte{}
	lines := strings.Split(string(note[at+2:len(note)-1]), "\n")
	for _, line := range lines {
		name, data, _ := strings.Cut(strings.TrimPrefix(line, "— "), " ")
		value := decode64(data)
		check(len(value) > 4 && strings.HasPrefix(line, "— ") && len(lines) <= 64, "a line of the note is no signature")
		if id := name + "\n" + string(value[:4]); byKey[id] == nil {
			byKey[id] = value[4:]
		}
	}
	cosigned := -1 // the log's signature is no cosignature
	for i, key := range keys.all {
		if value := byKey[key.name+"\n"+string(key.id)]; value != nil || i == 0 {
			check(value != nil && key.verifies(text, value), "the signature by %s is missing or wrong", key.name)
			cosigned++
		}
	}
	parts := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	check(cosigned >= keys.quorum && len(parts) >= 3 && len(parts) <= 19 && !slices.Contains(parts, "") && parts[0] == keys.all[0].name &&
		sizeForm.MatchString(parts[1]), "the tree checkpoint is another log's, or %d witnesses are too few", cosigned)
	root := decode64(parts[2])
	check(len(root) == 32, "the tree checkpoint has no root")
	return must(strconv.ParseUint(parts[1], 10, 63)), [32]byte(root)
}

func verifyReceipt(path, publicKey string, rest []string, out io.Writer) {
	content := must(os.ReadFile(path))
	var receipt struct {
		Version     int
		Line, Proof string
	}
	strictJSON(content, &receipt)
	check(receipt.Version == 1 && len(content) <= 2375680, "the receipt has another version or size")
	e, _ := parseLine([]byte(receipt.Line))
	facts := "archives backups_removed destroyed_at epoch signature tombstone tombstone_tag"
	e.checkFacts(facts)
	check(e.kind == "destroy_key" && e.outcome == "ok" && len(e.facts) == len(strings.Fields(facts)) &&
		e.isSignedBy(decode64(publicKey), "minikms/audit/receipt/v1"), "the audit key has signed no such line")
	fmt.Fprintf(out, "%s was destroyed at %d\n", e.keyID, e.integer("destroyed_at"))
	if len(rest) > 0 {
		index, size := verifyProof(receipt.Proof, leafOf([]byte(receipt.Line+"\n")), parseNoteKeys(rest))
		fmt.Fprintf(out, "it is leaf %d of a tree of %d\n", index, size)
	}
}

// verifyProof checks a C2SP tlog-proof of a leaf (RFC 9162, section 2.1.3.2).
func verifyProof(proof string, leaf [32]byte, keys noteKeys) (uint64, uint64) {
	head, note, _ := strings.Cut(proof, "\n\n")
	lines := strings.Split(head, "\n")
	if len(lines) > 1 && strings.HasPrefix(lines[1], "extra ") {
		lines = slices.Delete(lines, 1, 2)
	}
	check(len(lines) >= 2 && lines[0] == "c2sp.org/tlog-proof@v1" && strings.HasPrefix(lines[1], "index "), "there is no proof")
	index := must(strconv.ParseUint(strings.TrimPrefix(lines[1], "index "), 10, 63))
	size, root := openCheckpoint([]byte(note), keys)
	check(index < size, "the tree checkpoint has no such leaf")
	at, last := index, size-1
	for _, line := range lines[2:] {
		hash := decode64(line)
		check(len(hash) == 32 && last > 0, "the proof has a wrong hash")
		if at&1 == 1 || at == last {
			leaf = node([32]byte(hash), leaf)
			for at&1 == 0 && at != 0 {
				at, last = at>>1, last>>1
			}
		} else {
			leaf = node(leaf, [32]byte(hash))
		}
		at, last = at>>1, last>>1
	}
	check(last == 0 && leaf == root, "the proof does not lead to the root")
	return index, size
}
