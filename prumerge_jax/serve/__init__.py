"""An OpenAI-compatible server: adaptive visual tokens per image, under continuous batching."""
