"""An encoder over a whole set: features, their neighbours, k-means."""
