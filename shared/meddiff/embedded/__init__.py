"""The embedded stack: a real Redis-protocol server, a real S3 server and the services as local processes."""
