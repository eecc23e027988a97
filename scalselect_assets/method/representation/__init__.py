"""The representation: from a conversation with images to one vector."""
