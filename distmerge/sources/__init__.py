"""Where inputs come from: folders and Hub repositories, headers, byte ranges."""
