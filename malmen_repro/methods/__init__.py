"""The other editors, a module each, behind the protocol of `malmen_repro.protocol`."""
