"""An OpenAI-compatible HTTP server over one model (the extra `smolrun[server]`)."""

import logging

# Who takes the application into a program of their own decides where its lines go (`logs.listen`).
logging.getLogger("smolrun.server").addHandler(logging.NullHandler())
