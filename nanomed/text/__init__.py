"""Text into token ids and back: tokenizers, chat templates, and the segments they make."""
