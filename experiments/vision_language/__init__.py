"""Images and the sentences that name or describe them: a small dual model and what is measured on it."""
