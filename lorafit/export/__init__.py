"""A finished model for other programs: GGUF (llama.cpp, Ollama), vLLM, the hub."""
