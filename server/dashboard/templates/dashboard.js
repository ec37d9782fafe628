// Keeps the page up to date: the server sends a part's HTML whenever it changes, and its clock.
"use strict";
(() => {
  const RETRY = 5000, SILENCE = 45000; // milliseconds
  const parts = [...document.querySelectorAll("[data-part]")];
  const link = document.getElementById("link");
  const linkText = document.getElementById("link-text");
  const announcement = document.getElementById("announcement");
  let ahead = Number(document.body.dataset.clock) * 1000 - Date.now(); // of this machine's clock
  let heard = Date.now();
  let stream = null;

  const age = (seconds) => {
    if (seconds < 3) return "just now";
    if (seconds < 99.5) return `${Math.round(seconds)} s ago`;
    if (seconds < 5970) return `${Math.round(seconds / 60)} min ago`;
    if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
    return `${Math.round(seconds / 86400)} days ago`;
  };

  const tick = () => {
    const now = Date.now() + ahead;
    for (const time of document.querySelectorAll("time[data-age]")) {
      time.title ||= time.textContent;
      const text = age((now - Date.parse(time.dateTime)) / 1000);
      if (time.textContent !== text) time.textContent = text;
    }
    if (link.dataset.link === "off") linkText.textContent = `Not live, as of ${age((Date.now() - heard) / 1000)}`;
    if (stream && Date.now() - heard > SILENCE) open();
  };

  const show = (live) => {
    link.dataset.link = live ? "on" : "off";
    if (live) linkText.textContent = "Live";
  };

  const announce = () => {
    const where = document.querySelector("[data-said]");
    if (!where) return;
    document.title = `${where.dataset.said} · ${where.dataset.title} · Fedloom`;
    if (announcement.textContent !== where.dataset.said) announcement.textContent = where.dataset.said;
  };

  const hear = (event) => {
    heard = Date.now();
    show(true);
    return event.data;
  };

  const open = () => {
    if (stream) stream.close();
    heard = Date.now();
    stream = new EventSource(document.body.dataset.stream);
    stream.addEventListener("clock", (event) => {
      ahead = Number(hear(event)) * 1000 - Date.now();
    });
    for (const part of parts) {
      let last = null;
      stream.addEventListener(part.id, (event) => {
        const html = hear(event);
        if (html === last) return;
        last = html;
        part.innerHTML = html;
        announce();
        tick();
      });
    }
    stream.addEventListener("error", () => {
      show(false);
      if (stream.readyState === EventSource.CLOSED) setTimeout(open, RETRY); // the server was full, or is gone
    });
  };

  announce();
  tick();
  setInterval(tick, 1000);
  open();
})();
