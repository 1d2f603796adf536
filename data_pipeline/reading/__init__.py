"""From .beton files to batches: checks, decoders, the loader, the order, the transfer."""
