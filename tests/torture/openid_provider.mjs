// An OpenID provider with JWT access tokens, plain and bound to the client's certificate (RFC 8705).
// Arguments: port, certificate, private key, CA of client certificates.
import fs from 'node:fs';
import https from 'node:https';
import { generateKeyPairSync } from 'node:crypto';
import Provider from 'oidc-provider';

const [port, cert, key, ca] = process.argv.slice(2);
const jwk = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey.export({ format: 'jwk' });
const client = { client_secret: 'secret', grant_types: ['client_credentials'], redirect_uris: [], response_types: [], id_token_signed_response_alg: 'ES256' };
const provider = new Provider(`https://localhost:${port}`, {
  clients: [
    { client_id: 'chat', ...client },
    { client_id: 'bound', ...client, tls_client_certificate_bound_access_tokens: true },
  ],
  jwks: { keys: [{ ...jwk, use: 'sig', alg: 'ES256' }] },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    mTLS: {
      enabled: true,
      certificateBoundAccessTokens: true,
      getCertificate: (ctx) => ctx.socket.getPeerX509Certificate(),
    },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => 'urn:minikms',
      getResourceServerInfo: () => ({
        scope: 'kms', audience: 'minikms', accessTokenFormat: 'jwt', accessTokenTTL: 600, jwt: { sign: { alg: 'ES256' } },
      }),
    },
  },
});
const options = { cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca), requestCert: true };
https.createServer({ ...options, rejectUnauthorized: false }, provider.callback()).listen(Number(port), '127.0.0.1');
