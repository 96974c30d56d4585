<!DOCTYPE html>
<html lang="en">
<title>LAMP</title>
<h1>It works</h1>
<p>Apache and PHP <?= PHP_VERSION ?> answer. Put your site into <code>/var/www/html</code>.</p>
<p>MariaDB listens inside this machine; the password of its user <code>root</code> lies in
<code>~/application_password</code> of the user that you log in as.</p>
</html>
