"""What people ask over HTTP, and what answers them."""
