"""Which keys and values are kept, and in what form."""
