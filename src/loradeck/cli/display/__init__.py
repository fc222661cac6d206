"""What the verbs print: text and tables, charts, the live view of a run, and its plan."""
