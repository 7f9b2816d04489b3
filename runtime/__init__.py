"""The device runtime: opens a bundle and answers a question about an image. Never imports torch."""
