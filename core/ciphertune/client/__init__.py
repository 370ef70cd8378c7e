"""The data owner's side of a session: keys, requests and replies."""
