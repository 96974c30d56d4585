// Yours to replace; `systemctl restart nodejs` takes up a change. SESSION_SECRET is this instance's own.
const express = require('express');

const app = express();
app.set('trust proxy', 'loopback');

app.get('/', (request, response) => {
  response.send(`<!DOCTYPE html>
<html lang="en">
<title>Node.js</title>
<h1>Express on Node.js ${process.version}</h1>
<p>The application lies in <code>/srv/nodejs/app.js</code>.</p>
</html>
`);
});

app.listen(process.env.PORT, '127.0.0.1');
