// A click on a phrase asks for its overlays, one on the phrase that is shown, or on the button, for the whole pictures.
// Gradio runs this for the list's component: `element` is that, and `trigger` sends its events.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button"), list = element.querySelector(".phrases");
  if (!button || !list) return;
  const number = button.matches(".phrase[aria-pressed=false]") ? button.dataset.number : null;
  list.dataset.asked = number ?? "";
  trigger("select", {
    number: number === null ? null : Number(number),
    text: number === null ? null : button.querySelector(".phrase-text").textContent,
  });
});
// Sent once the pictures are there.
element.addEventListener("shown", () => {
  const list = element.querySelector(".phrases"), shown = list?.dataset.asked;
  if (shown === undefined) return;
  const hadFocus = document.activeElement?.matches(".phrases-whole");
  const before = list.querySelector(".phrase[aria-pressed=true]");
  for (const phrase of list.querySelectorAll(".phrase")) phrase.ariaPressed = String(phrase.dataset.number === shown);
  if (shown) list.dataset.shown = shown;
  else delete list.dataset.shown;
  if (!shown && hadFocus) before?.focus();
  // Where the pictures stay in sight, what is pressed may have come to lie behind them.
  const columns = document.querySelector("#columns"), pressed = list.querySelector(".phrase[aria-pressed=true]");
  list.style.setProperty("--pictures-end", `${columns.offsetHeight}px`);
  const stays = getComputedStyle(columns).position === "sticky";
  (stays ? pressed : columns).scrollIntoView({block: "nearest"});
});
