"""Servers that speak the OpenAI protocol: asking them, many prompts at a time, and starting one."""
