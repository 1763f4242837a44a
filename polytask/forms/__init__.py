"""The room of forms: what an adapter may be. One file each; `polytask.core.form` holds the contract."""
