"""The services of a laptop: an S3 server and MLflow, on loopback, under one home folder."""
