"""The untrusted side: weights, sessions and the evaluation of requests."""
