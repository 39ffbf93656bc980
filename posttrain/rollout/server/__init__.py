"""The transformers engine behind the HTTP surface of OpenAI: `posttrain serve --engine hf`."""
