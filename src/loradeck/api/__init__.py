"""An engine behind the HTTP interface that OpenAI's clients speak: the only room that knows HTTP."""
