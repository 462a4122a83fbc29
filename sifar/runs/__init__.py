"Run folders: what they hold, and what is said of it."
