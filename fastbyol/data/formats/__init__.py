"""File formats: .beton, tar shards and their manifest, and JPEG headers and decoders."""
