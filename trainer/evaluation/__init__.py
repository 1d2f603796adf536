"""What a frozen encoder is worth: nearest neighbours and linear probes."""
