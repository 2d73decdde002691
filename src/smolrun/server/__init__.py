"""An OpenAI-compatible HTTP server over one model (the extra `smolrun[server]`)."""
