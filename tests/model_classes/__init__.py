"""The walk over SGLang's model classes: each one built, and loaded where an export of it can be described, on the meta device."""
