// node-vault at a gateway: prints one JSON object of what it got. Arguments: endpoint, CA file, token, certificate, key.
import { readFileSync } from 'node:fs';
import nodeVault from 'node-vault';

const [endpoint, ca, token, cert, key] = process.argv.slice(2);
const requestOptions = { ca: readFileSync(ca) };
if (cert) Object.assign(requestOptions, { cert: readFileSync(cert), key: readFileSync(key) });
const vault = nodeVault({ endpoint, token, requestOptions });
const name = `node-${cert ? 'certificate' : 'token'}`;
const plaintext = Buffer.from('hello').toString('base64');
const failed = (call) => call.then(() => null, (error) => [error.response.statusCode, error.message]);

const seen = { health: await vault.health(), sealed: (await vault.status()).sealed };
await vault.transitCreateKey({ name, type: 'aes256-gcm96' });
const sealed = await vault.encryptData({ name, plaintext });
await vault.write(`transit/keys/${name}/rotate`, {});
const rewrapped = await vault.rewrapData({ name, ciphertext: sealed.data.ciphertext });
const opened = await vault.decryptData({ name, ciphertext: rewrapped.data.ciphertext });
seen.prefixes = [sealed, rewrapped].map((answer) => answer.data.ciphertext.slice(0, 9));
seen.opened = opened.data.plaintext === plaintext;
seen.read = (await vault.transitReadKey({ name })).data;
seen.listed = (await vault.transitListKeys()).data.keys.includes(name);
const plain = nodeVault({ endpoint, token, requestOptions, noCustomHTTPVerbs: true });
seen.listedByGet = (await plain.list('transit/keys')).data.keys.includes(name);
const batch = await vault.write(`transit/encrypt/${name}`, { batch_input: [{ plaintext }, { plaintext }] });
seen.batch = batch.data.batch_results.length;
seen.dataKey = (await vault.write(`transit/datakey/plaintext/${name}`, {})).data.plaintext.length;
await vault.write(`transit/keys/${name}-macs`, { type: 'hmac' });
const { hmac } = (await vault.write(`transit/hmac/${name}-macs`, { input: plaintext })).data;
await vault.write(`transit/keys/${name}-macs/rotate`, {});
seen.macs = await Promise.all([hmac, `${hmac.slice(0, -4)}AAA=`].map(
    async (claim) => (await vault.write(`transit/verify/${name}-macs`, { input: plaintext, hmac: claim })).data.valid));
seen.deleted = await failed(vault.transitDeleteKey({ name }));
seen.unknown = await failed(vault.encryptData({ name: 'nothing', plaintext }));
seen.ttl = (await vault.tokenLookupSelf()).data.ttl;
seen.renewed = await failed(vault.tokenRenewSelf());
if (!cert) {
    const other = nodeVault({ endpoint, requestOptions });
    await other.jwtLogin({ role: 'any', jwt: token });
    seen.login = other.token === token;
}
console.log(JSON.stringify(seen));
