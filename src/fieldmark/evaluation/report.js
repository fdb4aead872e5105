"use strict";
// Each select hides the items of its part that have another value, and says how many are left. Without this script the
// selects stay hidden and everything is shown.
document.querySelectorAll("select[data-filters]").forEach((select) => {
  const bar = select.closest(".filter");
  const status = bar.querySelector("[role=status]");
  const part = document.getElementById(select.dataset.filters);
  const items = [...part.querySelectorAll("[data-value]")];
  const groups = [...part.querySelectorAll("[data-group]")];
  const show = () => {
    items.forEach((item) => {
      item.hidden = select.value !== "" && item.dataset.value !== select.value;
    });
    groups.forEach((group) => {
      group.hidden = !group.querySelector("[data-value]:not([hidden])");
    });
    const left = items.filter((item) => !item.hidden).length;
    status.textContent = `${left} of ${items.length} ${select.dataset.noun} shown`;
  };
  bar.hidden = false;
  select.addEventListener("change", show);
  show(); // a browser may keep the choice when the page is loaded again
});
