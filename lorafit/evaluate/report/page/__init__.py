"""The page of an evaluation: its words, its content, its charts, and the template, style and script they go into."""
