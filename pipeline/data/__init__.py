"""From a data set to tokenised samples: files, chats, tokens, selection."""
