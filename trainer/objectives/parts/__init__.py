"""What objectives share: key encoders, queues, rows by sample, clusterings, means."""
