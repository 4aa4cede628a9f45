package main

// The keys of a backup archive: shares.md, backup.md, formats.md, tombstones.md, stream.md.

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/mlkem"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

var base32Text = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// aad is the label, which ends in NUL, then each field behind its length.
func aad(label string, fields ...string) []byte {
	made := append([]byte(label), 0)
	for _, field := range fields {
		made = append(binary.BigEndian.AppendUint32(made, uint32(len(field))), field...)
	}
	return made
}

func number(value uint64) string { return string(binary.BigEndian.AppendUint64(nil, value)) }

func hmac256(key []byte, data []byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write(data)
	return mac.Sum(nil)
}

func gcm(key []byte) cipher.AEAD { return must(cipher.NewGCM(must(aes.NewCipher(key)))) }

// xaesOpen opens the sealed form of XAES-256-GCM: nonce | ciphertext | tag.
func xaesOpen(what string, key, sealed, associated []byte) []byte {
	check(len(sealed) >= 40, "%s is too short", what)
	block := must(aes.NewCipher(key))
	k1, derived := make([]byte, 16), []byte{}
	block.Encrypt(k1, k1)
	high := k1[0] >> 7
	for i := range 15 {
		k1[i] = k1[i]<<1 | k1[i+1]>>7
	}
	k1[15] = k1[15]<<1 ^ high*0x87
	for _, count := range []byte{1, 2} {
		text := append([]byte{0, count, 'X', 0}, sealed[:12]...)
		for i := range text {
			text[i] ^= k1[i]
		}
		block.Encrypt(text, text)
		derived = append(derived, text...)
	}
	text, err := gcm(derived).Open(nil, sealed[12:24], sealed[24:], associated)
	check(err == nil, "%s does not open", what)
	return text
}

func multiply(a, b byte) (product byte) {
	for ; b > 0; b >>= 1 {
		product ^= (b & 1) * a
		a = a<<1 ^ (a>>7)*0x1b
	}
	return product
}

// readShare gives the head of 19 bytes and the secret of 32.
func readShare(line string) (head, secret []byte) {
	replaced := strings.NewReplacer(" ", "", "\t", "", "\r", "", "-", "", "o", "0", "i", "1", "l", "1")
	text, begins := strings.CutPrefix(replaced.Replace(strings.ToLower(line)), "mks1")
	payload, err := base32Text.DecodeString(text)
	check(begins && len(line) <= 256 && err == nil && len(payload) == 59 && base32Text.EncodeToString(payload) == text,
		"a share has another form")
	head, secret = payload[:19], payload[19:51]
	sum := hmac256(secret, aad("minikms/share-checksum/v1", string(head)))
	check(head[0] == 1 && hmac.Equal(sum[:8], payload[51:]), "a share has a typing mistake")
	return head, secret
}

// readShares combines the shares that a file holds, a line each.
func readShares(path string) []byte {
	content := strings.TrimSpace(string(must(os.ReadFile(path))))
	shares, set := map[byte][]byte{}, ""
	for _, line := range strings.Split(content, "\n") {
		head, secret := readShare(line)
		own := string(head[:17]) + string(head[18])
		check(shares[head[17]] == nil && head[17] > 0 && (set == "" || own == set), "the shares are not different ones of one set")
		shares[head[17]], set = secret, own
	}
	check(len(shares) >= int(set[17]), "%d shares are needed, and there are %d", set[17], len(shares))
	root := make([]byte, 32)
	for x, share := range shares {
		weight := byte(1) // the Lagrange polynomial of x, at 0
		for other := range shares {
			for i := 0; other != x && i < 254; i++ { // the inverse is the power of 254
				weight = multiply(weight, other^x)
			}
			if other != x {
				weight = multiply(weight, other)
			}
		}
		for i := range root {
			root[i] ^= multiply(share[i], weight)
		}
	}
	return root
}

// The fields have the names of the JSON members, which Go compares without their case.
type keyring struct {
	Format, Keyring_id, Created_at, Updated_at, Audit_origin string
	Version, Epoch, Key_version                              uint64
	Slots                                                    []struct {
		Slot_id, Fingerprint, Provider, Created_at, Tested_at, Replaces string
		Commitment, Public_key, Sealed, Mac, Wrapped_auth               []byte
		Shares                                                          any
	}
	Keks []struct {
		Version                                     uint64
		State, Created_at, Retired_at, Destroyed_at string
		Wrapped                                     []byte
	}
	Audit_keys []struct {
		Version, Since_seq                               uint64
		Created_at                                       string
		Public_key, Wrapped_key, Wrapped_seed, Since_sig []byte
	}
	Tombstone_log struct {
		Count             uint64
		Head, Wrapped_key []byte
	}
	Rotation, Retired_roots, Revoking, Members any
}

type key struct {
	file struct {
		Id, Created_at, Thread_id, Purpose, Algorithm, State, Retired_at, Replaces, Replaced_by string
		Wrapped                                                                                 []byte
		Format, Version, Kek_version, Number                                                    uint64
	}
	raw []byte
}

type archive struct {
	ids  []string
	keys map[string]key
}

func strictJSON(content []byte, target any) {
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(target)
	check(err == nil, "JSON: %v", err)
	_, err = decoder.Token()
	check(err == io.EOF, "something follows a JSON object")
}

// openArchive checks the whole archive and opens every key in it.
func openArchive(path, shares string) *archive {
	root := readShares(shares)
	entries, names := readArchive(must(os.ReadFile(path)), root)
	var whole struct {
		Body json.RawMessage
		Tag  []byte
	}
	var ring keyring
	strictJSON(entries["keyring.json"], &whole)
	strictJSON(whole.Body, &ring)
	ringKey := ring.open(root)
	xaesOpen("the keyring", ringKey, whole.Tag, aad("minikms/keyring/v1", string(whole.Body)))
	unwrap := func(kind string, version uint64, sealed []byte) []byte {
		return xaesOpen(kind, ringKey, sealed, aad("minikms/"+kind+"/v1", ring.Keyring_id, number(version)))
	}
	for _, audit := range ring.Audit_keys {
		unwrap("audit-key", audit.Version, audit.Wrapped_key)
		public := ed25519.NewKeyFromSeed(unwrap("audit-seed", audit.Version, audit.Wrapped_seed)).Public()
		check(ed25519.PublicKey(audit.Public_key).Equal(public), "an audit key is not that of its seed")
	}
	keks := map[uint64][]byte{}
	for _, kek := range ring.Keks {
		if kek.State != "destroyed" {
			keks[kek.Version] = unwrap("kek", kek.Version, kek.Wrapped)
		}
	}
	unwrap("tombstone-key", 1, ring.Tombstone_log.Wrapped_key)
	opened := &archive{keys: map[string]key{}}
	for _, name := range names {
		id, isDek := strings.CutPrefix(strings.TrimSuffix(name, ".json"), "kms-deks/")
		if isDek {
			opened.keys[id], opened.ids = openDek(id, entries[name], keks), append(opened.ids, id)
		}
	}
	return opened
}

var dekName = regexp.MustCompile(`^kms-deks/k_[0-7][0-9a-hjkmnp-tv-z]{25}\.json$`)

func readArchive(content, root []byte) (map[string][]byte, []string) {
	rest := content
	take := func(count uint64) []byte {
		check(count <= uint64(len(rest)), "the archive ends too early")
		taken := rest[:count]
		rest = rest[count:]
		return taken
	}
	text := func() string { return string(take(uint64(take(1)[0]))) }
	check(string(take(16)) == "minikms-backup\x00\x04", "this is no archive of version 4")
	entries, names, last := map[string][]byte{}, []string{}, ""
	order := []string{"keyring.json", "kms-tombstones", "manifest.json"}
	for {
		name := string(take(uint64(binary.BigEndian.Uint16(take(2)))))
		if name == "" {
			break
		}
		size, rank := binary.BigEndian.Uint64(take(8)), slices.Index(order, name)
		check(rank >= 0 || dekName.MatchString(name) && size <= 1024, "the archive has an unknown entry")
		before := slices.Index(order, last)
		check(rank > before || rank == before && name > last, "the entries of the archive have another order")
		entries[name], names, last = take(size), append(names, name), name
	}
	check(entries[order[0]] != nil && entries[order[2]] != nil, "the archive lacks its keyring or its manifest")
	keyringID, slots := text(), make([][2]string, take(1)[0])
	for i := range slots {
		slots[i] = [2]string{text(), hex.EncodeToString(take(8))}
	}
	digest, authentic := sha256.Sum256(content[:len(content)-len(rest)]), false
	for _, slot := range slots {
		tag := take(32)
		if slot[1] == fingerprint(root) {
			auth := expand(root, 32, "minikms/slot-auth/v2", keyringID, slot[0])
			authentic = hmac.Equal(tag, hmac256(auth, aad("minikms/archive-slot/v1", slot[0], string(digest[:]))))
		}
	}
	check(authentic && len(rest) == 0, "the archive was altered, or is of another root key")
	return entries, names
}

func fingerprint(root []byte) string {
	return hex.EncodeToString(hmac256(root, aad("minikms/root-fingerprint/v1"))[:8])
}

func expand(root []byte, size int, label string, fields ...string) []byte {
	return must(hkdf.Expand(sha256.New, root, string(aad(label, fields...)), size))
}

// open gives the keyring key, from the slot of the root key.
func (ring *keyring) open(root []byte) []byte {
	check(ring.Format == "minikms-keyring" && ring.Version == 5, "the keyring has another version")
	for _, slot := range ring.Slots {
		if slot.Fingerprint != fingerprint(root) {
			continue
		}
		id, slotID, digest := ring.Keyring_id, slot.Slot_id, sha256.Sum256(slot.Sealed)
		commitment, auth := expand(root, 32, "minikms/root-commitment/v1", slotID), expand(root, 32, "minikms/slot-auth/v2", id, slotID)
		mac := hmac256(auth, aad("minikms/slot-mac/v2", id, slotID, number(ring.Key_version), string(digest[:])))
		check(hmac.Equal(commitment, slot.Commitment) && hmac.Equal(mac, slot.Mac), "the slot was altered")
		info := aad("minikms/slot-sealed/v2", id, slotID, string(commitment), number(ring.Key_version))
		return hpkeOpen(expand(root, 96, "minikms/slot-kem/v2", id, slotID), slot.Sealed, info)
	}
	panic(refusal("the keyring has no slot of this root key"))
}

// hpkeOpen is RFC 9180 in base mode: X-Wing, HKDF-SHA256, AES-256-GCM. seeds: of ML-KEM-768, then of X25519.
func hpkeOpen(seeds, sealed, info []byte) []byte {
	check(len(sealed) == 1168, "the sealed keyring key has another length")
	sharedM := must(must(mlkem.NewDecapsulationKey768(seeds[:64])).Decapsulate(sealed[:1088]))
	private := must(ecdh.X25519().NewPrivateKey(seeds[64:]))
	sharedX := must(private.ECDH(must(ecdh.X25519().NewPublicKey(sealed[1088:1120]))))
	shared := sha3.Sum256(slices.Concat(sharedM, sharedX, sealed[1088:1120], private.PublicKey().Bytes(), []byte(`\.//^\`)))
	suite := "HPKE-v1HPKE\x64\x7a\x00\x01\x00\x02"
	extract := func(salt []byte, label string, text []byte) []byte {
		return hmac256(salt, append([]byte(suite+label), text...))
	}
	context := slices.Concat([]byte{0}, extract(nil, "psk_id_hash", nil), extract(nil, "info_hash", info))
	secret := extract(shared[:], "secret", nil)
	expanded := func(label string, size int) []byte {
		return must(hkdf.Expand(sha256.New, secret, "\x00"+string(rune(size))+suite+label+string(context), size))
	}
	text, err := gcm(expanded("key", 32)).Open(nil, expanded("base_nonce", 12), sealed[1120:], nil)
	check(err == nil, "the keyring key does not open")
	return text
}

func openDek(id string, content []byte, keks map[uint64][]byte) (opened key) {
	strictJSON(content, &opened.file)
	file := opened.file
	check(len(content) == 1024 && file.Id == id && file.Format == 1 && file.Algorithm == "XAES-256-GCM" &&
		keks[file.Kek_version] != nil, "the file of %s is damaged", id)
	label, fields := "minikms/dek/v1", []string{id, file.Thread_id, file.Purpose, file.Algorithm}
	if file.Number > 0 {
		label, fields = "minikms/dek/v2", append(fields, number(file.Number))
	}
	fields = append(fields, number(file.Kek_version))
	opened.raw = xaesOpen(id, keks[file.Kek_version], file.Wrapped, aad(label, fields...))
	return opened
}

func (opened *archive) openRecord(id string, sealed, caller []byte) []byte {
	dek, ok := opened.keys[id]
	check(ok && dek.file.Purpose != "mac", "the archive has no key %s that seals", id)
	return xaesOpen("the record", dek.raw, sealed, aad("minikms/record/v1", number(1), id, dek.file.Thread_id, string(caller)))
}

// openStream writes authenticated chunks; what it has written is complete only if it returns.
func (opened *archive) openStream(in *bufio.Reader, out io.Writer) {
	take := func(size int64) []byte { return must(io.ReadAll(io.LimitReader(in, size))) }
	head := take(46)
	check(len(head) == 46 && string(head[:16]) == "minikms-stream\x00\x01", "this is no stream of version 1")
	size := int64(binary.BigEndian.Uint16(head[44:]))
	wrapped := take(size)
	check(1 <= size && size <= 1024 && int64(len(wrapped)) == size, "the header of the stream is damaged")
	aead := gcm(opened.openRecord(string(head[16:44]), wrapped, []byte("minikms-stream v1")))
	associated := aad("minikms/stream/v1", string(head)+string(wrapped))
	for n, final := uint64(0), false; !final; n++ {
		chunk := take(65536 + 16)
		_, err := in.Peek(1)
		check(err == nil || err == io.EOF, "%v", err)
		final = err == io.EOF
		nonce := []byte("\x00\x00\x00" + number(n) + "\x00")
		if final {
			nonce[11] = 1
		}
		text, err := aead.Open(nil, nonce, chunk, associated)
		check(err == nil && n < 1<<32 && (n == 0 || len(text) > 0), "the stream does not open")
		must(out.Write(text))
	}
}
