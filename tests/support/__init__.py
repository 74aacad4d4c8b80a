"""What several tests need: tiny models, scripted plugins, gates, questions, pages."""
