"""This package serves one artifact on this machine through OpenAI's interface: `mobilemoe serve`."""
