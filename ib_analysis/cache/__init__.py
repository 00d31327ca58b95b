"""What is kept of a KV cache: its plan, the compressed cache, and the seam into transformers."""
