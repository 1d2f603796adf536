"""From a folder, an archive or a library's set to a .beton and its manifest."""
