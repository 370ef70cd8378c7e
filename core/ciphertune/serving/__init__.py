"""A server at the data owner's, which answers programs by the chat-completions protocol."""
