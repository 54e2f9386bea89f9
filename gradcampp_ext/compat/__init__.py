"""Drop-in classes for users of other libraries, one module a library."""
