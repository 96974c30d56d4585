<!DOCTYPE html>
<html lang="en">
<title>Welcome to nginx!</title>
<h1>Welcome to nginx!</h1>
<p>PHP <?= PHP_VERSION ?> answers behind it. Put your site into <code>/var/www/html</code>.</p>
<p>MariaDB listens inside this machine; the password of its user <code>root</code> lies in
<code>~/application_password</code> of the user that you log in as.</p>
</html>
