// What stays in this browser: the chats, the newest first, within the room that it gives them.

const CHATS = "braid.conversations", MAX_KEPT = 100;

// False where there is no room, or no storage at all.
export function keep(name, value) {
  try {
    localStorage.setItem(name, value);
    return true;
  } catch {
    return false;
  }
}

export function loadChats() {
  try {
    const found = JSON.parse(localStorage.getItem(CHATS) ?? "[]");
    return Array.isArray(found) ? found.filter((one) => Array.isArray(one?.messages)) : [];
  } catch {
    return [];
  }
}

// Returns the chats as they are kept. Where there is no room pictures go before words, and the oldest before the newest; where there is
// none for anything, all of them last as long as the page.
export function keepChats(chats) {
  const wanted = chats.slice(0, MAX_KEPT);
  let kept = wanted;
  while (!keep(CHATS, JSON.stringify(kept))) {
    const at = kept.findLastIndex((one) => one.messages.some((message) => message.images?.length));
    kept = at < 0 ? kept.slice(0, -1) : kept.map((one, index) => (index === at ? withoutPictures(one) : one));
    if (!kept.length) return wanted;
  }
  return kept;
}

function withoutPictures(chat) {
  const bare = (message) => (message.images?.length ? { ...message, images: [], numLost: message.images.length } : message);
  return { ...chat, messages: chat.messages.map(bare) };
}
