// The prompt's marks lie over its box, pictures of another prompt are marked, and Ctrl+Enter draws.
(() => {
  const LIKE_THE_BOX = ["font", "letterSpacing", "padding", "direction", "textAlign", "tabSize"];
  const find = (selector) => document.querySelector(selector);
  const watched = new WeakSet();

  function refresh() {
    const box = find("#prompt textarea");
    if (!box) return;
    if (!watched.has(box)) {
      watched.add(box);
      box.dir = "auto";
      box.addEventListener("input", refresh);
      box.addEventListener("scroll", () => lay(box));
      new ResizeObserver(() => lay(box)).observe(box);
    }
    follow(box.value);
    lay(box);
    for (const drawn of document.querySelectorAll(".drawn")) {
      const prompt = drawn.querySelector("[data-prompt]")?.dataset.prompt;
      drawn.classList.toggle("earlier", prompt !== undefined && plain(prompt) !== plain(box.value));
    }
  }

  const plain = (text) => text.replace(/\r\n?/g, "\n");

  // Until the server has planned the text again, marks move with the text that they stand in.
  function follow(text) {
    const layer = find("#meter .meter-text");
    if (!layer || layer.textContent === text) return;
    const before = layer.textContent, most = Math.min(before.length, text.length);
    let head = 0, tail = 0;
    while (head < most && before[head] === text[head]) head++;
    while (tail < most - head && before[before.length - 1 - tail] === text[text.length - 1 - tail]) tail++;
    const range = document.createRange();
    range.setStart(...place(layer, head));
    range.setEnd(...place(layer, before.length - tail));
    range.deleteContents();
    range.insertNode(document.createTextNode(text.slice(head, text.length - tail)));
  }

  // The node and the offset in it of a character.
  function place(layer, character) {
    const nodes = document.createTreeWalker(layer, NodeFilter.SHOW_TEXT);
    let node, last = null;
    while ((node = nodes.nextNode())) {
      if (character <= node.length) return [node, character];
      character -= node.length;
      last = node;
    }
    return last ? [last, last.length] : [layer, 0];
  }

  // Put the marks where the text is: same place, same size, same lines, scrolled as far.
  function lay(box) {
    const layer = find("#meter .meter-text"), home = find("#prompt-and-meter");
    if (!layer || !home) return;
    const from = home.getBoundingClientRect(), to = box.getBoundingClientRect(), style = getComputedStyle(box);
    for (const name of LIKE_THE_BOX) layer.style[name] = style[name];
    layer.style.left = `${to.left + box.clientLeft - from.left - home.clientLeft}px`;
    layer.style.top = `${to.top + box.clientTop - from.top - home.clientTop}px`;
    layer.style.width = `${box.clientWidth}px`;
    layer.style.height = `${box.clientHeight}px`;
    layer.scrollTop = box.scrollTop;
    // Where a long label would end outside, labels stand on the other sides of their marks.
    for (const mark of layer.querySelectorAll(".meter-mark"))
      mark.style.setProperty("--shift", mark.offsetLeft + 110 > layer.clientWidth ? "-100%" : "0%");
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (!event.target.closest?.("#prompt, #negative-prompt")) return;
    event.preventDefault();
    find("#draw:not(:disabled)")?.click();
  });

  let planned = false;
  new MutationObserver(() => {
    if (planned) return;
    planned = true;
    requestAnimationFrame(() => {
      planned = false;
      refresh();
    });
  }).observe(document, {subtree: true, childList: true, characterData: true});
})();
