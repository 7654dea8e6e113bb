"""What an encoder is made to read: images of other than three channels."""
